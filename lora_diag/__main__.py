"""``python -m lora_diag``."""

from lora_diag.cli import main

if __name__ == "__main__":
    main()
