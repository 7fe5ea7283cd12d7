"""Evidence: the settings that experiments run on, and the experiments themselves."""

from .compare import Comparison, Row, compare
from .settings import Setting, batch_seed, get_setting, setting_names

__all__ = ["Comparison", "Row", "Setting", "batch_seed", "compare", "get_setting", "setting_names"]
