"""What a graph computes inside while it runs on text: the text, and the values."""

from .magnitudes import Magnitudes as Magnitudes
from .magnitudes import magnitudes as magnitudes
from .ranges import cache_ranges as cache_ranges
from .samples import Calibration as Calibration
from .samples import CalibrationIds as CalibrationIds
from .samples import random_ids as random_ids
from .samples import read_text as read_text
from .samples import write_text as write_text
from .values import watch as watch
