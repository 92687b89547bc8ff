"""``python -m air_moe_megatron.plan``; see ``command.py``."""

from air_moe_megatron.plan.command import main

if __name__ == "__main__":
    main()
