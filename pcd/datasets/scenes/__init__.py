"""Made-up rooms and streets, ray-cast with exact depth: what the `synthetic` dataset is made of.

`raycast` finds what every pixel sees, `materials` what it is made of, `shading` how it is lit, `sensor` what a camera would
have recorded of it; `rooms` and `roads` invent the scenes from parts in `furniture` and `roadside`.
"""
