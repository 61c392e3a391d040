"""The operators. Each is one file; importing it enters it in the registry that tests and benchmarks iterate over."""

from nasdet._dispatch import use_backend
from nasdet.ops.mix import mix
from nasdet.ops.norm_act_mix import norm_act_mix

__all__ = ["mix", "norm_act_mix", "use_backend"]
