"""Muon: the update of a layer's matrix is its momentum made nearly orthogonal (--optimizer muon)."""
