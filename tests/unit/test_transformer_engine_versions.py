"""What the backend `te` relies on in Transformer Engine, read in the source of real versions of the package.

The package cannot be imported without CUDA, but its wheels hold the Python files: they are fetched from the package
index (one download of about a megabyte for each version, kept in pytest's cache folder) and read as syntax trees. The
versions are the ends of the supported range and those around which the signatures drifted. Without the index the tests
are skipped.
"""

from __future__ import annotations

import ast
import functools
import inspect
import subprocess
import sys
import zipfile

import pytest

from megatron_opdlm.models.attention.transformer_engine import FIRST_VERSION, LAST_VERSION
from tests.fake_transformer_engine import DotProductAttention, FakeTransformerEngine, fused_attn_fwd_2_9

VERSIONS = ("2.9.0", "2.11.0", "2.12.0", "2.14.1", "2.15.0", "2.20.2")
ATTENTION = "attention/dot_product_attention"


@pytest.fixture(scope="module")
def wheels(request):
    """The wheel of each version, as far as the index gives them: the first failure ends the fetching."""
    folder = request.config.cache.mkdir("transformer_engine")
    fetched = {}
    for version in VERSIONS:
        fetched[version] = folder / f"transformer_engine-{version}-py3-none-any.whl"
        if not fetched[version].exists():
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            command += ["--dest", str(folder), "--retries=1", "--timeout=10", f"transformer-engine=={version}"]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                del fetched[version]
                break
    return fetched


@pytest.fixture(params=VERSIONS)
def package(request, wheels):
    """A function from a path under `transformer_engine/pytorch` to the syntax tree of that file."""
    if request.param not in wheels:
        pytest.skip(f"the package index does not give transformer-engine {request.param}")
    return functools.partial(read_tree, wheels[request.param])


@functools.cache
def read_tree(wheel, path):
    with zipfile.ZipFile(wheel) as archive:
        return ast.parse(archive.read(f"transformer_engine/pytorch/{path}.py"))


def function_named(tree, name):
    (function,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    return function


def method_named(tree, class_name, name):
    (owner,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    return function_named(ast.Module(owner.body, []), name)


def parameters(function):
    """All parameters, in order, and those without a default."""
    arguments = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return arguments, arguments[: len(arguments) - len(function.args.defaults)]


def calls_of(tree, name):
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [node for node in nodes if ast.unparse(node.func) == name]


def assigned_names(target):
    return [ast.unparse(element) for element in target.elts]


def kernel_calls(package):
    """The two assignments of a kernel's result in the forward of the autograd function: in FP8, in other formats."""
    tree = package(f"{ATTENTION}/backends")
    forwards = [method_named(tree, "FusedAttnFunc", "forward")]
    forwards += [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "_fused_attn_forward_impl"]
    assignments = [node for node in ast.walk(ast.Module(forwards, [])) if isinstance(node, ast.Assign)]
    return [node for node in assignments if calls_of(node, "fused_attn_fwd")]


def test_the_versions_span_the_supported_range():
    minors = [tuple(map(int, version.split(".")[:2])) for version in VERSIONS]
    assert (min(minors), max(minors)) == (FIRST_VERSION, LAST_VERSION)


def test_a_layer_passes_parameters_that_the_module_has(package):
    tree = package(f"{ATTENTION}/dot_product_attention")
    names, required = parameters(method_named(tree, "DotProductAttention", "__init__"))
    assert set(inspect.signature(DotProductAttention.__init__).parameters) <= set(names)
    assert required == ["self", "num_attention_heads", "kv_channels"]
    names, required = parameters(method_named(tree, "DotProductAttention", "forward"))
    assert names[:5] == list(inspect.signature(DotProductAttention.forward).parameters)
    assert set(required) <= {"self", "query_layer", "key_layer", "value_layer"}


def test_the_kernel_has_the_fakes_parameters(package, request):
    names, _ = parameters(function_named(package("cpp_extensions/fused_attn"), "fused_attn_fwd"))
    fakes = [fused_attn_fwd_2_9, FakeTransformerEngine("2.20").backends.fused_attn_fwd]
    first, last = (list(inspect.signature(fake).parameters) for fake in fakes)
    assert names.index("o_quantizer") == 16
    assert set(first) <= set(names) <= set(last)
    assert [name for name in last if name in names] == names
    version = request.node.callspec.params["package"]
    assert version != VERSIONS[0] or names == first
    assert version != VERSIONS[-1] or names == last


def test_the_autograd_function_calls_the_kernel_by_the_name_in_its_module(package):
    tree = package(f"{ATTENTION}/backends")
    imported = [name for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert [name.asname for name in imported if name.name == "fused_attn_fwd"] == [None]
    rebound = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    assert "fused_attn_fwd" not in rebound
    calls = kernel_calls(package)
    assert len(calls) == len(calls_of(tree, "fused_attn_fwd")) == 2
    assert [ast.unparse(call.value.args[16]) for call in calls] == ["O_quantizer", "None"]


def test_the_autograd_function_takes_the_output_then_the_statistics(package):
    fp8, others = (assigned_names(node.targets[0]) for node in kernel_calls(package))
    assert fp8 == ["out_", "aux_ctx_tensors", "*_"]
    assert others == ["out_", "aux_ctx_tensors", "*max_logit"]


def test_statistics_begin_with_the_log_sum_exp_and_end_with_the_random_state(package):
    """As Transformer Engine itself takes them apart where it merges the parts of a ring, each with its own kernel."""
    tree = function_named(package(f"{ATTENTION}/context_parallel"), "cp_p2p_fwd_fused_attn")
    assignments = (node for node in ast.walk(tree) if isinstance(node, ast.Assign))
    layouts = [assigned_names(x.targets[0]) for x in assignments if ast.unparse(x.value) == "aux_ctx_tensors"]
    plain = [[name for name in layout if not name.startswith("*")] for layout in layouts]
    assert plain and all((names[0], names[-1]) == ("softmax_lse_per_step", "rng_states") for names in plain)
    assert {len(names) for names in plain} <= {2, 3}


def test_the_choice_among_backends_is_made_by_a_name_of_the_utils_module(package):
    tree = package(f"{ATTENTION}/dot_product_attention")
    imports = [name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    (utils,) = (name.name for name in imports if name.asname == "dpa_utils")
    assert utils == "transformer_engine.pytorch.attention.dot_product_attention.utils"
    forward = method_named(tree, "DotProductAttention", "forward")
    assignments = [node for node in ast.walk(forward) if isinstance(node, ast.Assign)]
    (choice,) = (node for node in assignments if calls_of(node.value, "dpa_utils.get_attention_backend"))
    chosen = ["use_flash_attention", "flash_attention_backend", "use_fused_attention", "fused_attention_backend"]
    chosen += ["use_unfused_attention"]
    assert assigned_names(choice.targets[0]) == [*chosen, "_"]
    function = function_named(package(f"{ATTENTION}/utils"), "get_attention_backend")
    assert assigned_names(function.body[-1].value) == [*chosen, "available_backends"]
    (available,) = (x for x in ast.walk(function) if isinstance(x, ast.Assign) and is_named(x, "available_backends"))
    assert assigned_names(available.value) == [chosen[0], chosen[2], chosen[4]]


def is_named(assignment, name):
    return [ast.unparse(target) for target in assignment.targets] == [name]


def test_the_choice_is_remembered_in_one_dictionary_that_is_never_replaced(package):
    tree = package(f"{ATTENTION}/dot_product_attention")
    assignments = [x for x in ast.walk(tree) if isinstance(x, ast.Assign) and is_named(x, "_attention_backends")]
    (memory,) = assignments
    assert memory in tree.body
    fake = FakeTransformerEngine().front._attention_backends
    assert ast.literal_eval(memory.value) == fake
    forward = method_named(tree, "DotProductAttention", "forward")
    condition = "_attention_backends['attention_params'] is None"
    assert condition in {ast.unparse(node) for node in ast.walk(forward) if isinstance(node, ast.Compare)}


def test_the_version_of_cudnn_can_be_asked_for(package):
    names, _ = parameters(function_named(package("utils"), "get_cudnn_version"))
    assert names == []
