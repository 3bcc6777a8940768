"""Names on the hub, without a network: the real library on a prepared cache, and a fake hub."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, errors

from sparseopt.models import ModelError, load_decoder, open_model, open_source
from sparseopt.models.files.hub import HubName, parse_hub_name
from tests.fuzz.damage import refused
from tests.models.tiny import tiny_config, write_folder

SHA, OLD_SHA = "0123456789abcdef0123456789abcdef01234567", "f" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def store(cache, tensors, shards=1, sha=SHA, refs=("main",)):
    """A snapshot of `lab/tiny` as huggingface_hub leaves one: `refs/BRANCH` holds the commit."""
    repository = cache / "models--lab--tiny"
    for ref in refs:
        (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(sha)
    folder = write_folder(repository / "snapshots" / sha, tiny_config(), tensors, shards)
    (folder / "tokenizer.json").write_text("{}")
    return folder


class Hub:
    """Stands for the network: `model_info` lists files or raises, `snapshot_download` puts what is asked for in place.

    `asked` keeps the revision and the files of every call.
    """

    def __init__(self, monkeypatch, cache, folder=None):
        self.folder, self.cache = folder, cache
        self.files = sorted(file.name for file in folder.iterdir()) if folder else []
        self.sizes, self.asked, self.raised = {}, [], {}  # what is raised by call
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self.model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, repository, *, files_metadata, **_):
        assert files_metadata
        if "info" in self.raised:
            raise self.raised["info"]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=f, size=self.sizes.get(f)) for f in self.files])

    def snapshot_download(self, repository, *, revision, allow_patterns, local_files_only):
        if local_files_only:
            raise errors.LocalEntryNotFoundError("nothing in the cache")
        if "download" in self.raised:
            raise self.raised["download"]
        self.asked.append((revision, list(allow_patterns)))
        target = self.cache / "models--lab--tiny" / "snapshots" / SHA
        target.mkdir(parents=True, exist_ok=True)
        for name in set(allow_patterns) & set(self.files):
            (target / name).write_bytes((self.folder / name).read_bytes())
        return str(target)


def answer(kind, status):
    """An answer of the hub as the library raises it."""
    request = SimpleNamespace(method="GET", url="https://huggingface.co")
    response = SimpleNamespace(headers={}, status_code=status, request=request)
    return kind(f"{status} Client Error. (Request ID: 1)\n\nmore", response=response)


def test_a_name_is_owner_name_and_perhaps_a_revision_all_else_is_a_path():
    for text, name in {
        "HuggingFaceTB/SmolLM2-135M": HubName("HuggingFaceTB/SmolLM2-135M"),
        "lab/tiny@main": HubName("lab/tiny", "main"),
        f"lab/tiny@{SHA}": HubName("lab/tiny", SHA),
        "0-lab/a_b.c-2@refs/pr/3": HubName("0-lab/a_b.c-2", "refs/pr/3"),
    }.items():
        assert parse_hub_name(text) == name
        assert str(name) == text
    for path in ("tiny", "/a/b", "./a/b", "../b", "~/b", "a/b/c", "a/b.gguf", "a\\b", "a/", "/", ""):
        assert parse_hub_name(path) is None, path


def test_what_looks_like_a_name_and_is_none_says_why():
    for text, why in {
        "lab/ti--ny": "Cannot have -- or ..",
        "lab/ti..ny": "Cannot have -- or ..",
        "lab/tiny.git": "cannot end by '.git'",
        "lab/.tiny": "cannot start or end with",
        f"lab/{'x' * 100}": "the maximum length is 96",
        "lab/tiny@": "a branch, a tag or a commit, given ''",
        **{f"lab/tiny@{wrong}": f"given '{wrong}'" for wrong in ("../../x", "a/../../x", "/x", "a b")},
    }.items():
        with pytest.raises(ModelError, match=r"no path .*give OWNER/NAME") as caught:
            open_source(text)
        assert why in str(caught.value)


@pytest.mark.parametrize("shards", [1, 3])
def test_without_a_network_the_cache_does_and_that_is_said(cache, tensors, shards, caplog):
    folder = store(cache, tensors, shards)
    with caplog.at_level(logging.WARNING):
        source = open_source("lab/tiny")
    assert (source.path, source.name, source.revision) == (folder, "lab/tiny", SHA)
    assert f"lab/tiny: not fetched again (HF_HUB_OFFLINE is set); using the copy in the cache, commit {SHA}" in (
        caplog.text
    )
    assert set(source.tensors) == set(tensors)
    assert source.sidecars() == {"tokenizer.json": b"{}"}


def test_a_branch_a_commit_and_main_are_three_names_and_a_local_folder_comes_first(cache, tensors):
    store(cache, tensors)
    store(cache, tensors, sha=OLD_SHA, refs=("v1", "refs/pr/1"))
    names = {"": SHA, "@main": SHA, "@v1": OLD_SHA, f"@{OLD_SHA}": OLD_SHA, "@refs/pr/1": OLD_SHA}
    assert {name: open_source(f"lab/tiny{name}").revision for name in names} == names
    model = open_model("lab/tiny")
    assert model.source.revision == SHA
    assert open_model(model.source).source is model.source
    found = load_decoder(Path("lab/tiny")).head.lm_head.weight[...]
    np.testing.assert_array_equal(found, tensors["model.embed_tokens.weight"])
    mine = write_folder(Path("lab/tiny"), tiny_config(), tensors)
    source = open_source("lab/tiny")
    assert (source.path, source.name, source.revision) == (mine, "lab/tiny", None)


@pytest.mark.parametrize("lost", ["config.json", "model-00002-of-00003.safetensors", "snapshot", "all"])
def test_without_a_network_and_a_whole_copy_the_way_out_is_named(cache, tensors, lost):
    if lost != "all":
        folder = store(cache, tensors, 3)
        folder.rename(folder.with_name(OLD_SHA)) if lost == "snapshot" else (folder / lost).unlink()
    with pytest.raises(ModelError) as caught:
        open_source("lab/tiny@main")
    text = str(caught.value)
    assert text.startswith("no path lab/tiny@main exists on this machine, and the Hugging Face hub did not give it")
    assert f"(HF_HUB_OFFLINE is set), and the cache {cache} holds no complete copy" in text
    assert "`hf download lab/tiny --revision main --local-dir FOLDER` and give the folder" in text


def test_a_broken_connection_is_told_from_an_answer(cache, tensors, monkeypatch, caplog):
    broken = getattr(__import__(errors.HTTPError.__module__.partition(".")[0]), "ConnectError")  # noqa: B009
    with monkeypatch.context() as patch:
        fake = Hub(patch, cache)
        fake.raised["info"] = broken("[Errno -2] Name or service not known")
        with pytest.raises(ModelError, match=r"did not give it .*ConnectError: \[Errno -2\].*`hf download lab/tiny"):
            open_source("lab/tiny")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fake.model_info)
    store(cache, tensors)
    assert open_source("lab/tiny").revision == SHA
    assert "not fetched again (ConnectError" in caplog.text


def test_only_what_is_needed_is_fetched_and_the_commit_is_pinned(tmp_path, cache, tensors, monkeypatch, caplog):
    folder = write_folder(tmp_path / "upstream", tiny_config(), tensors, 3)
    left = ("consolidated.safetensors", "pytorch_model.bin", ".gitattributes", "film.mp4")
    for extra in ("tokenizer.json", "LICENSE", "README.md", "preprocessor_config.json", *left):
        (folder / extra).write_bytes(b"{}")
    fake = Hub(monkeypatch, cache, folder)
    fake.files += ["original/params.json"]
    fake.sizes = {"film.mp4": 2**30}
    source = open_source("lab/tiny@v2")
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    carried = {"tokenizer.json", "LICENSE", "README.md", "preprocessor_config.json"}
    small = {"config.json", "model.safetensors.index.json"} | carried
    assert [revision for revision, _ in fake.asked] == ["v2", SHA]
    assert small <= set(fake.asked[0][1])
    assert fake.asked[1][1] == shards
    assert {file.name for file in source.path.iterdir()} == small | set(shards)
    assert (source.name, source.revision) == ("lab/tiny@v2", SHA)
    assert set(source.tensors) == set(tensors)
    assert set(source.sidecars()) == carried
    assert [record.message for record in caplog.records] == ["lab/tiny@v2: not fetched because of their size: film.mp4"]


WHOLE = ["config.json", "model.safetensors"]
NO_REVISION = answer(errors.RevisionNotFoundError, 404)
REPLIES = [
    (answer(errors.RepositoryNotFoundError, 404), r"has no model repository lab/tiny, or it is private; .*hf auth"),
    (answer(errors.GatedRepoError, 403), r"access on request: ask at https://huggingface\.co/lab/tiny.*hf auth login"),
    (NO_REVISION, "lab/tiny on the hub has no revision v9; give a branch, a tag"),
    (answer(errors.HfHubHTTPError, 503), r"did not give it \(HfHubHTTPError: 503.*\), .*; try again later"),
]
FULL = OSError(28, "No space left on device")
# What a repository holds, what the hub answers, and what is told.
ANSWERS = [
    (["config.json", "pytorch_model.bin"], {}, r"has no model\.safetensors.*pickled weights.*save_pretrained"),
    (["README.md", "tiny-Q4.gguf"], {}, r"`hf download lab/tiny FILE\.gguf --local-dir FOLDER` and give the path"),
    (["adapter.safetensors"], {}, r"no model\.safetensors.*it holds adapter\.safetensors; name the repository of"),
    (["model.safetensors"], {}, r"has no config\.json.*it holds model\.safetensors"),
    ([], {}, "it holds nothing"),
    ([f"{i}.txt" for i in range(11)], {}, r"it holds 0\.txt, .* and 3 more; name the"),
    *((WHOLE, {when: error}, message) for when in ("info", "download") for error, message in REPLIES),
    (WHOLE, {"download": FULL}, r"not be written to the cache .*No space left.*set HF_HUB_CACHE"),
]


@pytest.mark.parametrize(("files", "raised", "message"), ANSWERS)
def test_what_the_hub_answers_is_told_with_what_to_do_before_a_download(cache, monkeypatch, files, raised, message):
    fake = Hub(monkeypatch, cache)
    fake.files, fake.raised = files, raised
    refused(ModelError, message, open_source, "lab/tiny@v9")
    assert not fake.asked


def test_an_unknown_revision_is_never_answered_from_the_cache(cache, tensors, monkeypatch):
    store(cache, tensors, refs=("v9",))
    Hub(monkeypatch, cache).raised = {"info": NO_REVISION}
    refused(ModelError, "no revision v9", open_source, "lab/tiny@v9")


def test_an_index_that_names_files_elsewhere_fetches_none_of_them(tmp_path, cache, tensors, monkeypatch):
    folder = write_folder(tmp_path / "upstream", tiny_config(), tensors, 2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    fake = Hub(monkeypatch, cache, folder)
    refused(ModelError, "names files outside the folder", open_source, "lab/tiny")
    assert fake.asked[1:] in ([], [(SHA, [])])
