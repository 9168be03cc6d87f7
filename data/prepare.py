"""Labels made of other labels: the public name, for scripts that prepare data, of what data.tools.prepare has."""

from m3vit.data.tools.prepare import find_edges, fit_normals

__all__ = ["find_edges", "fit_normals"]
