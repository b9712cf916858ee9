"""New images classified by a finished run as a Ray job, with the arguments of ``spice-ray predict``.

ray job submit --working-dir . -- python jobs/predict.py /shared/run --data /shared/new --out /shared/predicted
"""

import sys

from spice_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "predict")
    main()
