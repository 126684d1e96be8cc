"""What an export does differently for each kind of module: capture, proof, and the manifest's fields."""

from .choose import open_job
from .job import Asked, Job

__all__ = ["Asked", "Job", "open_job"]
