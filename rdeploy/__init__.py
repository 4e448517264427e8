"""rdeploy: lower resolution, INT8 and real engines for trained vision models, measured on the target."""

__version__ = "0.1.0"
