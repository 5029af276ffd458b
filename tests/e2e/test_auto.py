"""``auto`` goes by the costs that an earlier start has kept, and the metrics tell which plan it follows, and why."""

import json

import httpx
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import serving

STEP = 0.5
"""Seconds of a step of one row, in a table that no machine gives."""


def plan_metrics(url):
    """The plan in force, and what each was expected to give."""
    samples = [s for f in text_string_to_metric_families(httpx.get(f"{url}/metrics").text) for s in f.samples]
    (plan,) = (s.labels["plan"] for s in samples if s.name == "tidar:plan_info")
    return plan, {s.labels["plan"]: s.value for s in samples if s.name == "tidar:plan_expected_goodput"}


def test_the_plan_follows_kept_costs_and_drafts_that_were_accepted(tmp_path):
    flags = ("--num-threads", "1", "--cost-cache", str(tmp_path))
    with serving(*flags):
        pass  # it has kept what it timed
    (file,) = tmp_path.glob("costs-*.json")
    kept = json.loads(file.read_text())
    for seconds_of_1000_rows in (STEP, 1000 * STEP):
        costs = {"num_requests": [1], "rows": [[1, 1000]], "seconds": [[STEP, seconds_of_1000_rows]]}
        kept["costs"] |= costs | {"per_kv_token": 0.0, "per_row_token": 0.0}
        file.write_text(json.dumps(kept))
        with serving(*flags) as (_, url), OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            options = {"temperature": 0, "max_tokens": 400, "extra_body": {"ignore_eos": True, "decoding": "auto"}}
            client.completions.create(model="tidar-stdlib", prompt="What does", **options)
            plan, goodput = plan_metrics(url)
        assert goodput["ar"] == pytest.approx(1 / STEP), "the table in the file, not what this machine takes"
        assert goodput[plan] == pytest.approx(max(goodput.values()), rel=0.011)
        assert (plan == "ar") == (seconds_of_1000_rows > STEP)
