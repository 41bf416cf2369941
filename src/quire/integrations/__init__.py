"""Quire inside other systems. Each needs its library only when it is used."""
