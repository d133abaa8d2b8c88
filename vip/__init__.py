"""Vision Permutators and the engine that trains them. Importing this package registers the models with timm."""

import vip.models.variants as variants

__all__ = ["variants"]
