import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from petald.config import Config, default_state_dir, format_config, parse_arguments
from petald.errors import ConfigError


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("XDG_") or name in ("PETALD_SOCKET", "PETALD_HOME", "STATE_DIRECTORY"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.setenv("HOME", "/home/ann")


def parse_file(tmp_path: Path, text: str, *flags: str) -> Config:
    file = tmp_path / "petald.toml"
    file.write_text(text, "utf-8")
    return parse_arguments(["--config", str(file), *flags])


def test_defaults_without_anything():
    config = parse_arguments([])
    assert config.daemon.socket == Path("/home/ann/.local/share/petald/petald.sock")
    assert config.daemon.state_dir == Path("/home/ann/.local/state/petald")
    assert config.network.listen == ("/ip4/0.0.0.0/tcp/7735",)
    assert config.serve.model == ""
    assert config.route.models == ()


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"STATE_DIRECTORY": "/var/lib/petald", "XDG_STATE_HOME": "/x"}, "/var/lib/petald"),
        ({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b"}, "/var/lib/a"),
        ({"XDG_STATE_HOME": "/x", "HOME": "/h"}, "/x/petald"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/h"}, "/h/.local/state/petald"),
        ({"HOME": "/h"}, "/h/.local/state/petald"),
    ],
)
def test_state_dir_follows_systemd_then_xdg(environ, folder):
    assert default_state_dir(environ) == Path(folder)


def test_file_goes_over_defaults_and_flags_over_file(tmp_path):
    text = """
        [daemon]
        socket = "~/s.sock"
        stop_timeout_s = 3
        [network]
        bootstrap = ["/ip4/10.0.0.1/tcp/1/p2p/12D3KooWA", "/dns/a.example/tcp/2/p2p/12D3KooWB"]
        [serve]
        model = "tiny"
        blocks = "0:10"
        threads = 2
    """
    config = parse_file(tmp_path, text, "--serve-threads", "4", "--serve-blocks=10:20")
    assert config.daemon.socket == Path("/home/ann/s.sock")
    assert config.daemon.stop_timeout_s == 3.0
    assert isinstance(config.daemon.stop_timeout_s, float)
    assert len(config.network.bootstrap) == 2
    assert (config.serve.blocks, config.serve.threads) == ("10:20", 4)
    assert config.serve.cache_tokens == 16384


def test_repeated_flags_make_a_list_and_replace_the_files(tmp_path):
    first, second = "/ip4/10.0.0.1/tcp/1/p2p/12D3KooWA", "/ip4/10.0.0.2/tcp/1/p2p/12D3KooWB"
    config = parse_file(
        tmp_path,
        f'[network]\nbootstrap = ["{first}"]\n',
        f"--network-bootstrap={second}",
        "--network-bootstrap",
        first,
    )
    assert config.network.bootstrap == (second, first)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("[serv]\n", ["unknown section [serv]", "nearest is [serve]"]),
        ("[quite_else]\n", ["unknown section [quite_else]", "[daemon], [network]"]),
        ("serve = 1\n", ["serve should be a section"]),
        ('[serve]\nmodle = "x"\n', ["[serve]", '"modle"', 'nearest is "model"']),
        ("[route]\ncache_tokens = 1\n", ["[route]", "cache_tokens", "[serve] has it"]),
        ("[route]\nzzz = 1\n", ["it has models, dtype, codec"]),
        ('[serve]\nthreads = "2"\n', ["[serve] threads", "whole number", "'2'"]),
        ("[serve]\nthreads = true\n", ["[serve] threads", "whole number", "True"]),
        ("[serve]\nthreads = 2.0\n", ["whole number"]),
        ("[serve]\nthreads = -1\n", ["0 to 1024", "-1"]),
        ("[serve]\nmodel = 3\n", ["a string"]),
        ('[route]\nmodels = "a"\n', ["a list of strings"]),
        ("[route]\nmodels = [1]\n", ["a list of strings"]),
        ('[route]\nmodels = [""]\n', ["an empty one"]),
        ("[daemon]\nstop_timeout_s = true\n", ["a number"]),
        ("[daemon]\nstop_timeout_s = nan\n", ["from 0 to 3600"]),
        ("[daemon]\nstop_timeout_s = -1\n", ["from 0 to 3600"]),
        ('[daemon]\nsocket = ""\n', ["a path"]),
        (f'[daemon]\nsocket = "/{"x" * 120}"\n', ["at most 107"]),
        ('[daemon]\nsocket_mode = "0888"\n', ["octal"]),
        ("[daemon]\nsocket_mode = 600\n", ["a string"]),
        ('[daemon]\nlog_level = "loud"\n', ['"warning"', "'loud'"]),
        ('[daemon]\nlog_format = "xml"\n', ['"json"']),
        ('[serve]\nmodel = "m"\nblocks = "10:10"\n', ["START:END", "'10:10'"]),
        ('[serve]\nblocks = "0:10"\n', ["no model is given"]),
        ('[serve]\nquant = "int5"\n', ["int5", "nf4"]),
        ('[serve]\ncodec = "hadamard4"\n', ["hadamard4", "int8"]),
        ('[route]\ncodec = "zip"\n', ["zip", "hadamard5"]),
        ('[serve]\ndtype = "int8"\n', ['"bfloat16"']),
        ('[serve]\ndevice = "gpu"\n', ['"cuda:1"']),
        ("[serve]\ncache_tokens = 0\n", ["at least 1"]),
        ('[network]\nlisten = ["0.0.0.0:7735"]\n', ["/ip4/", "0.0.0.0:7735"]),
        ('[network]\nlisten = ["/ip4/300.0.0.1/tcp/1"]\n', ["ip4"]),
        ('[network]\nlisten = ["/dns/a.example/tcp/1"]\n', ["to listen on"]),
        ('[network]\nbootstrap = ["/ip4/10.0.0.1/tcp/1"]\n', ["which peer"]),
        ('[network]\nannounce = ["/ip4/10.0.0.1/tcp/0"]\n', ["to announce"]),
        ("[serve\n", ["is not TOML"]),
    ],
)
def test_bad_file_is_named_with_what_was_expected(tmp_path, text, fragments):
    with pytest.raises(ConfigError) as caught:
        parse_file(tmp_path, text)
    said = str(caught.value)
    for fragment in fragments:
        assert fragment in said
    if "no model" not in said:
        assert "petald.toml" in said


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--serve-thread", "2"], ["--serve-thread", "nearest is --serve-threads"]),
        (["--serve-threads", "two"], ["--serve-threads", "whole number", "'two'"]),
        (["--serve-threads", "-1"], ["--serve-threads", "0 to 1024"]),
        (["--serve-threads"], ["--serve-threads", "expected one argument"]),
        (["--daemon-stop-timeout-s", "inf"], ["from 0 to 3600"]),
        (["serve"], ["'serve'"]),
        (["--config", "/nowhere/petald.toml"], ["cannot read /nowhere/petald.toml"]),
    ],
)
def test_bad_flags_are_named_with_what_was_expected(flags, fragments):
    with pytest.raises(ConfigError) as caught:
        parse_arguments(flags)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_print_config_reads_back_as_the_defaults(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--print-config"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert parse_file(tmp_path, text) == parse_arguments([])
    document = tomllib.loads(text)
    assert list(document) == ["daemon", "network", "serve", "lend", "route"]
    assert "socket" not in document["daemon"]  # as a comment: another machine has another
    assert "# socket = " in text


def test_format_config_reads_back_as_what_was_set(tmp_path):
    config = parse_arguments(
        ["--daemon-socket", '/run/"odd" \\ \x7f/s', "--serve-model", "ä\n", "--route-models=a"]
    )
    assert parse_file(tmp_path, format_config(config)) == config


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_flags_that_only_ask_end_well(flag, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments([flag])
    assert caught.value.code == 0
    assert "petald" in capsys.readouterr().out


def test_command_ends_with_2_and_one_line_on_a_bad_flag():
    ended = subprocess.run(
        [sys.executable, "-m", "petald", "--serve-bloks", "0:1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "--serve-blocks" in ended.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[serve]\nmodel = "m"\nmodels = ["n"]\n', "both set"),
        ('[serve]\nmodels = ["m", "n"]\nblocks = "0:10"\n', "set model where blocks"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(
    tmp_path: Path, text: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_file(tmp_path, text)
