"""The YAML file of options that `--config` names."""

import argparse
import os


def read_config(argv: list[str]) -> tuple[str | None, dict]:
    """Path and options of the YAML file that `--config` names, or (None, {}) without one.

    The file's `env` is put into the environment and not returned. Call this before transformers is imported, which reads
    the environment.
    Raises FileNotFoundError, and ValueError for a file that is not a mapping of options or gives one of them twice.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        path = parser.parse_known_args(argv)[0].config
    except argparse.ArgumentError as error:
        raise ValueError(error) from None
    if path is None:
        return None, {}
    config = _load(path)
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ValueError(f"{path} must hold options, one `name: value` per line")
    environment = config.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise ValueError(f"env in {path} must be a mapping of variables, found {environment!r}")
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    return path, config


def _load(path: str):
    import yaml

    class Loader(yaml.SafeLoader):
        """A loader that refuses keys given twice, of which the last would win silently."""

        def construct_mapping(self, node, deep=False):
            lines: dict[str, int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if key.value in lines and key.tag != "tag:yaml.org,2002:merge":
                    raise ValueError(
                        f"{path} gives {key.value} twice, in lines {lines[key.value]} and {line}: keep one"
                    )
                lines[str(key.value)] = line
            return super().construct_mapping(node, deep)

    with open(path) as file:
        try:
            return yaml.load(file, Loader)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a text file: {error}") from None
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from None
