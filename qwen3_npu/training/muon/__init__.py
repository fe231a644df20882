"""Muon: the momentum of a layer's matrix is made nearly orthogonal before it is added (--optimizer muon)."""
