"""Whether to compile, what is said when that can't be done, and kernels that a killed process left half-written."""

import copy
import gc
import os
import shlex
import sysconfig
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._inductor import config as inductor_config
from torch._inductor import cpp_builder, cpu_vec_isa
from torch.utils import cpp_extension

from nanochat import compilation, gpt
from nanochat.common import UserError
from nanochat.decoding import make_cache
from nanochat.gpt import GPT, GPTConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize(("wanted", "device", "eager_sec", "broken_compiler", "expected", "reason"), [
    ("off",  "cpu",  1e6,  "",            False, "asked for"),
    ("auto", "mps",  1e6,  "",            False, "mps"),
    ("auto", "cpu",  10.0, "",            False, "too short to pay for compiling: about 10 s"),
    ("auto", "cpu",  1e4,  "",            True,  "it works here"),
    ("auto", "cpu",  None, "",            True,  "it works here"),
    ("auto", "cuda", 1e4,  "",            True,  "it works here"),
    ("auto", "cpu",  1e4,  "no compiler", False, "no compiler"),
    ("on",   "cpu",  10.0, "",            True,  "it works here"),
    ("trunk", "cpu", 10.0, "",            True,  "all blocks as one"),
])
def test_choose_compile(wanted, device, eager_sec, broken_compiler, expected, reason, monkeypatch):
    monkeypatch.setattr(compilation, "probe_compiler", lambda device: broken_compiler)
    monkeypatch.setattr(compilation, "remove_broken_kernels", lambda: 0)
    enabled, why = compilation.choose_compile(wanted, torch.device(device), eager_sec)
    assert enabled == expected and reason in why


def test_compile_that_is_asked_for_but_broken_is_a_mistake(monkeypatch):
    monkeypatch.setattr(compilation, "probe_compiler", lambda device: "no compiler")
    monkeypatch.setattr(compilation, "remove_broken_kernels", lambda: 0)
    with pytest.raises(UserError, match="--compile on can't be had here: no compiler"):
        compilation.choose_compile("on", CPU, None)


def test_probe_names_what_is_wrong_with_the_compiler(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found\nin any of these")
    monkeypatch.setattr(torch, "compile", fail)
    assert compilation.probe_compiler(CPU) == "RuntimeError: No working C++ compiler found"


@pytest.mark.parametrize("fails", [False, True])
def test_probe_asks_the_best_vector_instructions_only(fails, monkeypatch):
    """Where they work, torch needn't ask for each set; where they don't, an old compiler say, it asks as ever."""
    trusted = []

    def compile_probe(device):
        trusted.append(inductor_config.cpp.vec_isa_ok)
        cpu_vec_isa.valid_vec_isa_list.cache_clear()
        assert not (fails and inductor_config.cpp.vec_isa_ok)
    monkeypatch.setattr(compilation, "compile_probe", compile_probe)
    monkeypatch.setattr(compilation, "link_awkward_paths", lambda: "")
    with inductor_config.patch({"cpp.vec_isa_ok": None}):
        assert compilation.probe_compiler(CPU) == "" and trusted == [True, None][:1 + fails]
        assert inductor_config.cpp.vec_isa_ok is (None if fails else True)
    trusted.clear()
    with inductor_config.patch({"cpp.vec_isa_ok": False}):  # TORCHINDUCTOR_VEC_ISA_OK=0
        assert compilation.probe_compiler(CPU) == "" and trusted == [False]
        assert inductor_config.cpp.vec_isa_ok is False


def test_vector_instructions_that_fail_are_not_remembered_as_working(monkeypatch):
    """Some sets keep their first answer, that of the time when torch was told to trust them."""
    def clear():
        cpu_vec_isa.valid_vec_isa_list.cache_clear()
        for isa in cpu_vec_isa.supported_vec_isa_list:
            getattr(type(isa).__bool__, "cache_clear", lambda: None)()

    def compile_probe(device):
        if inductor_config.cpp.vec_isa_ok:
            cpu_vec_isa.pick_vec_isa()
            raise RuntimeError("unknown option -mavx512f")
    monkeypatch.setattr(compilation, "compile_probe", compile_probe)
    monkeypatch.setattr(compilation, "link_awkward_paths", lambda: "")
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", lambda self, code: False)    # no set can be compiled
    try:
        clear()
        with inductor_config.patch({"cpp.vec_isa_ok": None}):
            assert compilation.probe_compiler(CPU) == "" and cpu_vec_isa.valid_vec_isa_list() == []
    finally:
        monkeypatch.undo()
        clear()


def test_collector_pauses_while_a_step_is_compiled():
    assert gc.isenabled()
    with pytest.raises(ValueError), compilation.pause_collector():
        assert not gc.isenabled()
        with compilation.pause_collector():
            pass
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()


def test_compiler_is_told_no_path_with_blanks_or_quotes(tmp_path, monkeypatch):
    """Torch, as in a .venv, and Python lie in such a folder; only the paths of headers are quoted."""
    awkward = tmp_path / "John O'Neill"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(torch, "__path__", [str(awkward / "torch")])
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", str(awkward / "torch" / "lib"))
    monkeypatch.setitem(sysconfig.get_config_vars(), "LIBDIR", str(awkward / "lib"))
    assert compilation.link_awkward_paths() == ""
    folders = [*cpp_builder._get_torch_related_args(False, False)[1], *cpp_builder._get_python_related_args()[1]]
    assert [Path(folder).resolve() for folder in folders] == [awkward / "torch" / "lib", awkward / "lib"]
    options = cpp_builder.BuildOptionsBase("g++", libraries_dirs=folders)
    command = cpp_builder.CppBuilder("kernel", "kernel.cpp", options).get_command_line()
    assert shlex.split(command)[-2:] == [f"-L{folder}" for folder in folders]
    # where no link can be made, the reason is in words
    monkeypatch.setattr(tempfile, "tempdir", str(awkward))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(awkward / "compiled"))
    reason = compilation.probe_compiler(CPU)
    assert f"the path {awkward / 'compiled'} has a blank or a quote" in reason and "or set TMPDIR" in reason


def test_half_written_kernels_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    files = {"ab/broken.so": b"", "ab/cd/broken2.so": b"", "ab/whole.so": b"\x7fELF", "ab/empty.txt": b"",
             "ab/being_written.so": b""}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
        age_sec = 0 if "being_written" in name else 3600
        os.utime(tmp_path / name, (time.time() - age_sec,) * 2)
    (tmp_path / "ab/deleted.so").symlink_to("by another rank meanwhile")
    # the other process has written its own by the time that the young empty file is looked at again
    being_written = tmp_path / "ab/being_written.so"
    monkeypatch.setattr(compilation.time, "sleep", lambda sec: being_written.write_bytes(b"\x7fELF"))
    assert compilation.remove_broken_kernels() == 2
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"ab/whole.so", "ab/empty.txt", "ab/being_written.so"}
    assert compilation.remove_broken_kernels() == 0
    (tmp_path / "ab/just_killed.so").write_bytes(b"")
    monkeypatch.setattr(compilation.time, "sleep", lambda sec: None)
    assert compilation.remove_broken_kernels() == 1


def test_fused_runs_compiled_only_when_that_is_on(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: lambda *args: calls.append(args) or -1)
    monkeypatch.setattr(compilation, "_compile_kernels", False)
    double = compilation.fused(lambda x: 2 * x)
    assert double(4) == 8 and not calls
    compilation.set_compile_kernels(True)
    assert double(4) == -1 and calls == [(4,)]
    compilation.set_compile_kernels(False)
    assert double(5) == 10


def test_trunk_is_one_graph_and_a_copy_reads_its_own_weights(monkeypatch):
    """With a cache, as in decoding, it runs as it did."""
    torch._dynamo.reset()
    counter, real = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=counter, **options))
    gpt.compile_trunk.cache_clear()
    model = GPT(GPTConfig(sequence_len=32, vocab_size=64, n_layer=4, n_head=1, n_kv_head=1, n_embd=32), torch.float32)
    model.init_weights()
    ids = torch.arange(64).view(2, 32)
    expected = model(ids, ids)
    model.compile_trunk()
    assert torch.equal(model(ids, ids), expected) and counter.frame_count == 1
    model(ids, ids).backward()
    assert all(param.grad is not None for param in model.parameters()) and counter.frame_count == 1
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.transformer.wte.weight)
    assert not torch.equal(other(ids, ids), expected)
    count = counter.frame_count
    assert model(ids, kv_cache=make_cache(model, 2, 32)).shape == (2, 32, 64) and counter.frame_count == count
    gpt.compile_trunk.cache_clear()


def test_rows_of_every_length_stay_compiled(monkeypatch):
    """Four variants a length; a block that reaches torch's limit, 8 as it comes, would go on eagerly, unsaid."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    compilation.set_compile_kernels(True)  # which raises the limit
    compilation.set_compile_kernels(False)
    T, counter = 32, CompileCounter()  # traces, but generates no code
    model = GPT(GPTConfig(sequence_len=T, vocab_size=64, n_layer=8, n_head=1, n_kv_head=1, n_embd=32), torch.float32)
    model.init_weights()
    for block in model.transformer.h:
        block.compile(dynamic=False, backend=counter)
    ids = torch.zeros(2 * T, dtype=torch.long)
    for _ in range(2):
        for row_tokens in (8, 16, 32):
            model(ids.view(-1, row_tokens), ids.view(-1, row_tokens)).backward()
    # with value embeddings and without, and the first, whose x is its x0; the last has the long window
    assert counter.frame_count == 4 * 3
    # from 1 token to 2048, and a fifth variant, of other patterns of windows; then evaluation, on whole rows only
    assert torch._dynamo.config.recompile_limit >= 5 * 12 + 2 * 5
