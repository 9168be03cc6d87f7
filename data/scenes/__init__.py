"""Procedural indoor scenes with exact labels: materials, furniture, rooms, and the renderer.

World frame: x right, y forward, z up, metres; the floor's surface is the plane z = 0.
Everything random is drawn from one `numpy.random.Generator` per scene, in a fixed order, so a scene is a function
of its seed.  Only `rendering` needs trimesh and embreex (the extra `train`).
"""
