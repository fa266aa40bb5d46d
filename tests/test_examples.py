"""The pictures that a visitor can choose: they show what the method is for, with the repository's weights."""

from __future__ import annotations

import pytest

from patchscaler.images import read_picture
from patchscaler.loading import load_pipeline
from patchscaler.plan import SamplingPlan, assign
from patchscaler.ui.page import example_files

pytestmark = pytest.mark.slow  # whole pictures with the repository's weights


@pytest.fixture(scope="module")
def counts() -> dict[str, list[int]]:
    """Patches in each group at the paper's plan, by the example's name."""
    pipeline = load_pipeline(device="cpu")
    confidence = {path.stem: pipeline.analyze(read_picture(path)).patch_confidence for path in example_files()}
    plan = SamplingPlan.paper()
    return {name: assign(each, plan).bincount(minlength=3).tolist() for name, each in confidence.items()}


def test_at_least_four_examples_have_patches_of_all_three_groups(counts):
    assert sum(all(groups) for groups in counts.values()) >= 4, counts


def test_the_page_opens_with_an_example_of_all_three_groups(counts):
    name, groups = next(iter(counts.items()))
    assert all(groups), (name, groups)
