"""Log handlers of a process that a person started; library code only ever asks for a logger."""

import logging

from pythonjsonlogger.json import JsonFormatter

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
JSON_FIELDS = "%(asctime)s %(levelname)s %(name)s %(message)s %(process)d"


def configure_logging(level: str, log_format: str) -> None:
    """Send logs to stderr at `level` as text or as one JSON object a line."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(JSON_FIELDS) if log_format == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
