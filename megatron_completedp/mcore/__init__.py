"""The engine: everything that touches Megatron-Core, and nothing else does.

`platform` must be installed before a model is built; `model.build_model` is the way in.
"""

from megatron_completedp.mcore.kernel_packages import hide_unusable

# Megatron imports Transformer Engine and Apex wherever it finds them, so this has to come before
# the first `import megatron.core` of any module of this package.
hide_unusable()
