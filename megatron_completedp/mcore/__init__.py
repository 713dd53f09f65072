"""The engine: everything that touches Megatron-Core, and nothing else does.

`platform` must be installed before a model is built; `model.build_model` is the way in.
"""

from megatron_completedp.mcore.transformer_engine import hide_if_broken

# Megatron imports Transformer Engine wherever it finds it, so this has to come before the first
# `import megatron.core` of any module of this package.
hide_if_broken()
