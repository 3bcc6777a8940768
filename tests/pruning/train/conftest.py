import pytest

from sparseopt.models import open_model
from sparseopt.pruning.train import distillation
from tests.pruning.train.tasks import OfBlock, OfModel


@pytest.fixture(scope="module", autouse=True)
def slices(module_monkeypatch):
    """The logits of a batch do not fit into one slice, nor into any number of them."""
    module_monkeypatch.setattr(distillation, "LOGIT_ROWS", 10)


@pytest.fixture(scope="module")
def model(models):
    return open_model(models("biased"))


@pytest.fixture(scope="module")
def of_block(model):
    return OfBlock(model)


@pytest.fixture(scope="module")
def of_model(model):
    return OfModel(model)


@pytest.fixture(params=["of_block", "of_model"])
def task(request):
    return request.getfixturevalue(request.param)
