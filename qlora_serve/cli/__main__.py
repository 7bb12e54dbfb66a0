"""`python -m qlora_serve.cli`."""

from qlora_serve.cli.main import main

main()
