"""Images decoded once into shards as a Ray job, with the arguments of ``spice-ray ingest``.

ray job submit --working-dir . -- python jobs/ingest.py /shared/photos /shared/shards --size 96
"""

import sys

from spice_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "ingest")
    main()
