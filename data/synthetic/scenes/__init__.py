"""Procedural scenes with exact labels: materials, solids, things and people, places, and the renderer.

World frame: x right, y forward, z up, metres; the ground's surface is the plane z = 0.
Everything random is drawn from one `numpy.random.Generator` per scene, in a fixed order, so a scene is a function
of its seed.

solids, materials   what everything is made of         meshes, rendering   triangles, rays, images
furniture, props,                                      nyud, pascal        scenes with the labels of a data set
people, animals,                                       layouts             their files
vehicles            lists of solids
place               what all places share
room, lived_room    indoors, empty and inhabited
outdoors            streets and meadows

Only meshes, rendering, nyud and pascal need trimesh and embreex (the extra `train`).
"""
