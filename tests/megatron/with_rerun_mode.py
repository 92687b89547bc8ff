"""Our entry, with the rerun mode that megatron-core 0.19 offers as a flag value but does not know itself.

Counts how often Megatron attempted a step, so that the test can tell that steps were run again.
"""

import sys

if __name__ == "__main__":
    from air_moe_megatron import cpu, pretrain

    cpu.enable()
    from megatron.core.rerun_state_machine import RerunMode

    from air_moe_megatron import step_hooks

    attempts = 0
    discard_statistics = step_hooks.discard_statistics

    def counted_discard(modules):
        global attempts
        attempts += 1
        discard_statistics(modules)

    RerunMode._value2member_map_["report_stats"] = RerunMode.REPORT_DETERMINISM_STATS
    step_hooks.discard_statistics = counted_discard
    pretrain.main()
    sys.stdout.write(f"attempts at a step: {attempts}\n")
