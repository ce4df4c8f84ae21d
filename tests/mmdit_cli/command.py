"""The `mmdit` command as the tests run it."""

from typer.testing import CliRunner

from mmdit_cli.main import app


def run(*words: str):
    return CliRunner().invoke(app, [str(word) for word in words])


def assert_one_line_error(result, text: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("mmdit: error: ") and result.stderr.count("\n") == 1, result.stderr
    assert text in result.stderr
    assert "Traceback" not in result.output
