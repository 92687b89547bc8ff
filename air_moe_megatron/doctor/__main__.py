"""``python -m air_moe_megatron.doctor``; see ``command.py``."""

from air_moe_megatron.doctor.command import main

if __name__ == "__main__":
    main()
