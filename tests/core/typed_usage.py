"""What users type against: mypy reads this file in `make checkstyle`; nothing runs it."""

import torch
from typing_extensions import assert_type

from mechanic_fused import MechanicAdam, MechanicAdamW, MechanicLion, MechanicSGD, step_together

model = torch.nn.Linear(2, 1)
opt = MechanicAdamW(model.parameters(), lr=1.0, weight_decay=0.01, scale_per="group")
assert_type(opt, MechanicAdamW)
assert_type(opt.scale, torch.Tensor)
assert_type(opt.learned_lr(), list[float])
assert_type(opt.implementation, str)
assert_type(opt.to_base(), torch.optim.Optimizer)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=10)
assert_type(MechanicAdam(model.parameters()), MechanicAdam)
assert_type(MechanicSGD(model.parameters(), momentum=0.9), MechanicSGD)
assert_type(MechanicLion(model.parameters()), MechanicLion)
step_together([opt])
MechanicAdamW(model.parameters(), learning_rate=1.0)  # type: ignore[call-arg]
MechanicSGD(model.parameters(), betas=(0.9, 0.99))  # type: ignore[call-arg]
