"""``python -m spice_ray`` is the command line."""

from spice_ray.cli import main

main()
