"""The fault table: the real `load_dataset(..., streaming=True)` against a stand-in of the Hub that misbehaves."""

import io
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_stand_in import HubStandIn, numbered_png, numbers, parquet_bytes

from ld_data import DataError, open_images

pytestmark = pytest.mark.timeout(180)
REPO = "owner/pictures"
SHARD = "train-00000-of-00003"  # 100 rows in 10 row groups and 30 MB, so that faults strike in its middle
LARGE = [numbered_png(number, side=320, compress_level=0) for number in range(100)]
SMALL = [numbered_png(number) for number in range(100, 140)]
ROWS = list(range(140))
CARD = b"""---
dataset_info:
  features:
  - {name: label, dtype: int64}
  - {name: image, dtype: image}
  splits:
  - {name: train, num_bytes: 1, num_examples: 140}
  download_size: 1
  dataset_size: 1
---
"""


@pytest.fixture(scope="module")
def shards():
    return {
        f"data/{SHARD}.parquet": parquet_bytes(LARGE),
        "data/train-00001-of-00003.parquet": parquet_bytes(SMALL[:20]),
        "data/train-00002-of-00003.parquet": parquet_bytes(SMALL[20:]),
    }


@pytest.fixture
def hub(monkeypatch, tmp_path, shards):
    with HubStandIn() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
        hub.add(REPO, shards)
        yield hub


def opened(tmp_path, source=REPO, **options):
    """A small cache whose retries take fractions of a second."""
    options = {"image_size": 16, "patience": 60, "retry_wait": 0.05, "timeout": 5, **options}
    return open_images(source, cache_dir=tmp_path / "cache", **options)


@pytest.fixture(scope="module")
def clean_order(tmp_path_factory, shards):
    """The order of the rows when nothing goes wrong."""
    with HubStandIn() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("NO_PROXY", "127.0.0.1")
        hub.add(REPO, shards)
        with opened(tmp_path_factory.mktemp("clean")) as cache:
            order = numbers(cache.wait().images)
    assert sorted(order) == ROWS
    return order


RECOVERS = {  # where, what, how often, after how many requests (a shard's first two are for its footer)
    "API 500": ("/api/", 500, 2, 0),
    "API 503": ("/api/", 503, 3, 0),
    "API 429": ("/api/", 429, 2, 0),
    "API 403 twice": ("/api/", 403, 2, 0),
    "listing 503": ("/tree/", 503, 2, 0),
    "shard 500": (SHARD, 500, 1, 4),
    "shard 503": (SHARD, 503, 2, 4),
    "shard 504": (SHARD, 504, 1, 4),
    "shard 429": (SHARD, 429, 1, 4),
    "shard 403 twice": (SHARD, 403, 2, 4),
    "shard 404 once": (SHARD, 404, 1, 4),
    "first request for the shard 503": (SHARD, 503, 1, 0),
    "reset in mid-shard": (SHARD, "reset", 2, 4),
    "early close in mid-shard": (SHARD, "close", 2, 4),
    "stall in mid-shard": (SHARD, "stall", 1, 4),
    "short body": (SHARD, "short", 2, 4),
    "short body of the footer": (SHARD, "short", 1, 0),
    "Range ignored": (SHARD, "no range", 2, 4),
    "Range ignored for the footer": (SHARD, "no range", 1, 0),
    "garbage once": (SHARD, "garbage", 1, 4),
}


@pytest.mark.parametrize("name", RECOVERS)
def test_every_row_arrives_exactly_once(hub, tmp_path, clean_order, name):
    where, kind, times, after = RECOVERS[name]
    hub.fault(REPO, where, kind, times=times, after=after)
    with opened(tmp_path) as cache:
        cache.wait()
        assert hub.faults[0]["times"] == 0, "the fault was never met"
        assert cache.complete
        assert numbers(cache.images) == clean_order
        assert cache.report["dropped"] == {}


@pytest.mark.parametrize(("kind", "card"), [(404, True), (404, False), ("truncated", True), ("garbage", True)])
def test_a_lost_shard_stops_and_the_next_run_resumes_there(hub, tmp_path, shards, clean_order, kind, card):
    if card:
        hub.add(REPO, {**shards, "README.md": CARD})
    last = (
        f"train-{max((clean_order.index(first), shard) for shard, first in enumerate((0, 100, 120)))[1]:05d}-of-00003"
    )
    lost_rows = 100 if last == SHARD else 20
    hub.fault(REPO, last, kind)
    with opened(tmp_path, patience=1) as cache:
        with pytest.raises(DataError) as failure:
            cache.wait()
        kept = numbers(cache.images)
    assert kept == clean_order[: 140 - lost_rows]
    said = str(failure.value)
    assert f"Shard {last}.parquet of {REPO}" in said
    if card:
        assert f"{lost_rows} of 140 rows are missing, {len(kept)} are kept" in said
    else:
        assert "1 of 3 shards are missing, about" in said
    assert said.count("\n") == 0

    hub.heal()
    hub.add(REPO, {"data/train-00000-of-00001.parquet": parquet_bytes(SMALL[:1])})  # an upload in between
    already = len(hub.requests)
    with opened(tmp_path) as cache:
        assert numbers(cache.wait().images) == clean_order
    again = [path for _, path, _ in hub.requests[already:] if path.endswith(".parquet")]
    assert again
    assert all(last in path for path in again), "shards that were complete were read again"


def test_a_shard_lost_in_its_middle_goes_on_in_its_middle(hub, tmp_path, clean_order):
    hub.fault(REPO, SHARD, 403, after=5)
    with opened(tmp_path, patience=1) as cache:
        with pytest.raises(DataError, match=f"Shard {SHARD}.parquet .* stays unreadable at row [1-9]"):
            cache.wait()
        kept = len(cache)
    assert 0 < kept < 140
    hub.heal()
    with opened(tmp_path) as cache:
        assert len(cache) >= kept
        assert numbers(cache.wait().images) == clean_order


@pytest.mark.parametrize("kind", [503, 429, "stall", "trickle"])
def test_an_endless_fault_ends_in_a_sentence(hub, tmp_path, kind):
    """Also where `datasets` itself would go on for half an hour, or where bytes trickle and no timeout ever fires."""
    hub.fault(REPO, SHARD, kind, after=4)
    with opened(tmp_path, patience=2, timeout=2) as cache:
        with pytest.raises(DataError, match=f"Shard {SHARD}.parquet of {REPO} stays unreadable .* are kept; open"):
            cache.wait()


def test_not_strict_makes_do_with_the_rows_there_are(hub, tmp_path):
    hub.fault(REPO, "train-00002", 404)
    with opened(tmp_path, patience=1, strict=False) as cache:
        with pytest.warns(UserWarning, match="train-00002.* Going on with the [1-9]"):
            cache.wait()
        assert cache.batch(4).shape == (4, 3, 16, 16)
        assert not cache.complete


def test_strict_refuses_a_batch_after_a_failure(hub, tmp_path):
    hub.fault(REPO, "train-00002", 404)
    with opened(tmp_path, patience=1) as cache:
        with pytest.raises(DataError, match="train-00002"):
            cache.wait()
        with pytest.raises(DataError, match="train-00002"):
            cache.batch(4)
        assert len(cache.images) == len(cache) > 0


def test_unusable_rows_are_counted_by_reason(hub, tmp_path):
    jpeg = b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(300)
    bad = [jpeg, b"<html>Not found</html>", None, numbered_png(1, side=1)]
    hub.add("owner/mixed", {"data/train-00000-of-00001.parquet": parquet_bytes([*SMALL, *bad])})
    with opened(tmp_path, "owner/mixed", max_bad=0.2) as cache:
        assert sorted(numbers(cache.wait().images)) == list(range(100, 140))
        dropped = cache.report["dropped"]
    assert dropped.pop("empty row") == 1
    assert dropped.pop("too small") == 1
    assert sum(dropped.values()) == 2
    assert set(dropped) <= {"damaged", "not a picture"}


def test_an_empty_shard_is_no_fault(hub, tmp_path):
    hub.add("owner/gap", {"train-0.parquet": parquet_bytes(SMALL), "train-1.parquet": parquet_bytes([])})
    with opened(tmp_path, "owner/gap") as cache:
        assert sorted(numbers(cache.wait().images)) == list(range(100, 140))


def test_a_finished_cache_opens_without_network_in_under_a_second(hub, tmp_path, monkeypatch):
    hub.add("owner/small", {"train.parquet": parquet_bytes(SMALL)})
    opened(tmp_path, "owner/small").wait().close()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.perf_counter()
    cache = opened(tmp_path, "owner/small")
    assert cache.complete
    assert time.perf_counter() - start < 1
    assert len(cache) == 40


def refused(tmp_path, source=REPO, patience=2, **options):
    with opened(tmp_path, source, patience=patience, **options) as cache, pytest.raises(DataError) as failure:
        cache.wait(1)
    assert str(failure.value).count("\n") == 0
    return str(failure.value)


def test_no_network_names_the_samples(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said = refused(tmp_path, patience=600)  # without a network one is not kept waiting for ten minutes
    assert "cannot be reached" in said
    assert 'source="samples"' in said


def test_an_unknown_id_says_to_check_the_name(hub, tmp_path):
    said = refused(tmp_path, "owner/nothing")
    assert "owner/nothing is no folder here, and no public data set" in said
    assert "check the name" in said


def test_an_unknown_revision_says_so(hub, tmp_path):
    assert "revision" in refused(tmp_path, revision="v2")


def test_an_unknown_split_names_the_splits_there_are(hub, tmp_path):
    assert f"{REPO} has no split 'test'; it has 'train'" in refused(tmp_path, split="test")


def test_a_set_without_pictures_says_which_columns_it_has(hub, tmp_path):
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b"]}), file)
    hub.add("owner/text", {"train.parquet": file.getvalue()})
    assert "no image column, only text" in refused(tmp_path, "owner/text")


def test_an_empty_set_says_so(hub, tmp_path):
    hub.add("owner/empty", {"train.parquet": parquet_bytes([])})
    assert "owner/empty has no rows" in refused(tmp_path, "owner/empty")


def test_a_set_without_files_says_so(hub, tmp_path):
    hub.add("owner/bare", {"README.md": b"nothing here"})
    assert "owner/bare cannot be opened" in refused(tmp_path, "owner/bare")


def test_picture_files_on_the_hub_work_too(hub, tmp_path):
    hub.add("owner/files", {f"train/{number}.png": numbered_png(number) for number in range(12)})
    with opened(tmp_path, "owner/files") as cache:
        assert sorted(numbers(cache.wait().images)) == list(range(12))
