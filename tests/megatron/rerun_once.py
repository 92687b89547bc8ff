"""Train with our entry while the first loss is made to look wrong once, and reports what the codebook counted."""

import sys

if __name__ == "__main__":
    from air_moe_megatron import cpu

    cpu.enable()
    cpu.set_rendezvous_defaults()
    sys.argv = cpu.with_required_flags(sys.argv)

    import torch

    from air_moe_megatron import batches, sync, training

    attempts, counted = [], []
    discard_statistics, update_codebooks, validate_loss = (
        sync.discard_statistics,
        sync.update_codebooks,
        batches.validate_loss,
    )

    def discard(modules):
        attempts.append(1)
        discard_statistics(modules)

    def update(modules, group=None):
        router = sync.air_routers(modules)[0]
        counted.append(float(router.codebook.statistics[:, router.config.hidden_size].sum()))
        return update_codebooks(modules, group)

    def validate(loss):
        validate_loss(loss)
        wrong = torch.full_like(loss, float("nan")) if len(attempts) == 1 else loss
        batches.get_rerun_state_machine().validate_result(
            wrong, rejection_func=torch.isnan, message="made to look wrong once", tolerance=0.0, fatal=False
        )

    sync.discard_statistics, sync.update_codebooks, batches.validate_loss = discard, update, validate
    training.train()
    sys.stdout.write(f"attempts {len(attempts)}, tokens counted {sum(counted)}\n")
