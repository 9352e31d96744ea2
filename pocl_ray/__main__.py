"""`python -m pocl_ray`, the same as the command `pocl-ray`."""

from pocl_ray.cli import main

main()
