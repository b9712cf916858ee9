"""A sweep as a Ray job, with the arguments of ``spice-ray tune``.

ray job submit --working-dir . -- python jobs/tune.py tune_configs/thresholds.yaml --data digits --out /shared/digits
"""

import sys

from spice_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "tune")
    main()
