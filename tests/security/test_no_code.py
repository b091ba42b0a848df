"""No file that is read can bring code: what could is named nowhere, or is by design.

Python that is run by design: a config file that the user names, and a law's file that
the user names. All else that a file says is data.
"""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PYTHON = sorted(
    file
    for folder in ("fm_jax", "configs", "launch")
    for file in (ROOT / folder).rglob("*.py")
)
SHELL = sorted(p for p in (ROOT / "launch").rglob("*") if p.suffix in (".sh", ".env"))

# Modules whose files or messages are programs, or that run what they are given.
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve",
           "marshal", "yaml", "ruamel", "code", "codeop", "runpy", "imp", "pty",
           "commands", "xmlrpc", "multiprocessing"}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__", "execfile", "input", "breakpoint"}
METHODS = {
    ("os", "system"), ("os", "popen"), ("os", "spawnl"), ("os", "spawnv"),
    ("os", "execv"), ("os", "execvp"), ("os", "startfile"), ("subprocess", "getoutput"),
    ("subprocess", "getstatusoutput"), ("np", "load"), ("numpy", "load"),
    ("torch", "load"), ("pd", "read_pickle"), ("pandas", "read_pickle"),
    ("asyncio", "create_subprocess_shell"), ("tempfile", "mktemp"),
}  # fmt: skip
KEYWORDS = {"allow_pickle": (True,), "shell": (True,), "trust_remote_code": (True,),
            "weights_only": (False,), "extraction_filter": (None,)}  # fmt: skip
# By design, and why it is safe; each is to be there, so that this list stays short.
ALLOWED = {
    # Config files and laws' files are Python that the user names.
    ("fm_jax/configfile.py", "exec_module"),
    ("fm_jax/scaling/lawfile.py", "exec_module"),
    # A side of a benchmark, of a table in the file itself.
    ("fm_jax/bench/child.py", "import_module"),
    # By a subclass of SafeLoader, which makes plain data.
    ("launch/k8s/validate.py", "yaml"),
    # Without allow_pickle NumPy refuses objects; its zip's size is looked at first.
    ("fm_jax/scaling/files.py", "np.load"),
}


def found_in(source, name):
    """Yield (file, what) for all in a source that can run what it is given."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            tops = {alias.name.split(".")[0] for alias in node.names}
            yield from ((name, top) for top in tops & MODULES)
        elif isinstance(node, ast.ImportFrom):
            top = (node.module or "").split(".")[0]
            names = {alias.name for alias in node.names}
            if top in MODULES:
                yield name, top
            yield from (
                (name, f"{top}.{one}") for one in names if (top, one) in METHODS
            )
            if "import_module" in names or "exec_module" in names:
                yield name, "import_module"
        elif isinstance(node, ast.Call):
            yield from ((name, what) for what in _of_call(node))


def _of_call(node):
    called = node.func
    if isinstance(called, ast.Name) and called.id in CALLS:
        yield called.id
    if isinstance(called, ast.Attribute):
        owner = called.value.id if isinstance(called.value, ast.Name) else ""
        if (owner, called.attr) in METHODS:
            yield f"{owner}.{called.attr}"
        if called.attr in ("exec_module", "import_module", "load_module"):
            yield called.attr
    text = ast.unparse(called)
    if text.startswith(("globals()[", "vars()[", "locals()[", "getattr(builtins")):
        yield f"{text}()"
    for keyword in node.keywords:
        if keyword.arg in KEYWORDS:
            value = keyword.value
            is_plain = isinstance(value, ast.Constant)
            if not is_plain or value.value in KEYWORDS[keyword.arg]:
                yield keyword.arg


def in_shell(text):
    """Yield lines of a shell script that run text, or show what is secret."""
    for line in text.splitlines():
        plain = line.split("#")[0]
        if re.search(r"(^|[\s;&|(])(eval|source <\()\s|\|\s*(ba)?sh\b", plain):
            yield line
        if re.search(r"set -[a-z]*x|--export=ALL,\w*(KEY|TOKEN|SECRET)", plain):
            yield line


def test_nothing_can_run_what_it_is_given():
    """Fault 49, security: code in a file that is read as data.

    Promise: no pickle, eval, shell or remote code on any path; CI finds the first one.
    """
    found = {
        one
        for file in PYTHON
        for one in found_in(file.read_text(), file.relative_to(ROOT).as_posix())
    }
    assert found - ALLOWED == set()
    assert ALLOWED - found == set(), "what is gone must not be allowed any more"
    for file in SHELL:
        assert list(in_shell(file.read_text())) == []


def test_the_search_looks_at_all_there_is():
    names = {file.relative_to(ROOT).as_posix() for file in PYTHON}
    assert {"fm_jax/cli.py", "configs/base.py", "launch/local.py"} <= names
    assert len(names) > 200
    assert SHELL


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "pickle"),
        ("import a, pickle as p", "pickle"),
        ("from pickle import loads", "pickle"),
        ("def f():\n    import dill.source", "dill"),
        ("from yaml import load", "yaml"),
        ("import marshal", "marshal"),
        ("x = eval(text)", "eval"),
        ("exec(open(file).read())", "exec"),
        ("compile(text, 'a', 'exec')", "compile"),
        ("__import__(name)", "__import__"),
        ("importlib.import_module(name)", "import_module"),
        ("from importlib import import_module", "import_module"),
        ("spec.loader.exec_module(module)", "exec_module"),
        ("np.load(file)", "np.load"),
        ("np.load(file, allow_pickle=True)", "allow_pickle"),
        ("np.load(file, allow_pickle=flag)", "allow_pickle"),
        ("torch.load(file)", "torch.load"),
        ("torch.load(file, weights_only=False)", "weights_only"),
        ("f.from_pretrained(x, trust_remote_code=True)", "trust_remote_code"),
        ("load_dataset(x, trust_remote_code=trust)", "trust_remote_code"),
        ("subprocess.run(text, shell=True)", "shell"),
        ("os.system(text)", "os.system"),
        ("from os import system", "os.system"),
        ("tempfile.mktemp()", "tempfile.mktemp"),
        ("globals()[name](1)", "globals()[name]()"),
    ],
)
def test_what_is_planted_is_found(source, what):
    assert ("a.py", what) in set(found_in(source, "a.py"))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "re.compile(pattern)",
        "lowered.compile()",
        "json.load(file)",
        "subprocess.run(words)",
        "f(trust_remote_code=False, weights_only=True, shell=False)",
        "def eval_step(): pass",
    ],
)
def test_what_only_looks_like_it_is_let_be(source):
    assert not set(found_in(source, "a.py"))


@pytest.mark.parametrize(
    "line", ['eval "$x"', "curl x | sh", "set -eux", "sbatch --export=ALL,HF_TOKEN=a"]
)
def test_what_is_planted_in_a_script_is_found(line):
    assert list(in_shell(f"#!/bin/bash\n{line}\n"))


def test_a_script_as_ours_is_let_be():
    assert not list(in_shell('set -euo pipefail\nexec "$@"  # eval "$x"\n. "$f"\n'))


def test_code_that_the_user_names_is_said_to_be_code():
    readme = (ROOT / "README.md").read_text()
    security = readme.partition("## Security")[2].partition("\n## ")[0]
    assert "config file is Python" in security
    assert "law" in security
