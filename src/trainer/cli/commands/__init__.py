"""The commands of ``trainstep``, one a file.

Each has ``SUMMARY``, ``DESCRIPTION`` and ``EPILOG`` for its help, ``add_arguments(parser)``, and
``run(options)``, which returns a ``Result`` or raises ``Refusal``. What takes long to import (torch, above
all) is imported in ``run``.
"""
