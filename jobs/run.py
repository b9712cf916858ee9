"""The pipeline as a Ray job, with the arguments of ``spice-ray run``.

ray job submit --working-dir . -- python jobs/run.py digits --data digits --out s3://bucket/digits
"""

import sys

from spice_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "run")
    main()
