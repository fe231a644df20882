"""Exposed communication of overlapped products, in closed form."""
