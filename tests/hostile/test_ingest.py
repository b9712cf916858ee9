from pathlib import Path

import pyarrow.parquet as pq
import pytest

from spice_ray import intake
from spice_ray.config import Scale
from spice_ray.console import ConsoleReporter
from tests.hostile.corpus import Good, Ignored, write_corpus
from tests.hostile.reading import SIZE, Found, is_expected, pixels


@pytest.mark.usefixtures("local_ray")
def test_ingest_puts_every_good_file_in_a_shard_and_every_bad_one_among_the_rejects(tmp_path: Path) -> None:
    cases = write_corpus(tmp_path / "in")
    source = intake.open_source(str(tmp_path / "in"))
    source.listing_digest()
    for case in cases:
        case.vanish(tmp_path / "in")
    shards = intake.ingest(source, tmp_path / "out", Scale(), image_size=SIZE, seed=0, reporter=ConsoleReporter())

    rows = pq.read_table(sorted(shards.path.glob("part-*.parquet")), columns=["source", "image"]).to_pylist()
    rejects = pq.read_table(shards.path / "rejects.parquet").to_pylist()
    found: dict[str, Found] = {row["source"]: pixels(row["image"]) for row in rows}
    found |= {row["source"]: row["reason"] for row in rejects}
    assert [case.name for case in cases if not is_expected(case, found.get(case.source))] == []
    assert set(found) == {case.source for case in cases if not isinstance(case.expected, Ignored)}
    assert len(rows) == sum(isinstance(case.expected, Good) for case in cases)
    assert len(rows) + len(rejects) == len(found)
    assert (shards.manifest["num_images"], shards.manifest["num_rejects"]) == (len(rows), len(rejects))
