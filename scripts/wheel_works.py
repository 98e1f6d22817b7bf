"""That the installed package has its part in C++ and runs it: `scripts/wheel` and the builders of wheels call this."""

import sys
from pathlib import Path

import torch
from torch import nn

import tokenmerge

package = Path(tokenmerge.__file__).parent
assert package.is_relative_to(sys.prefix), f"{package} is not what was installed in {sys.prefix}."
parts = sorted(path.name for path in package.glob("kernels/native.*.so"))
assert parts, f"{package} has no part in C++."

layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
handle = tokenmerge.patch(model, r=8)
with torch.no_grad():
    model(torch.randn(2, 50, 64))
used = handle.report().kernels
assert used["bipartite"] == used["merge"] == "cpu", used
print(f"tokenmerge {tokenmerge.__version__}: {', '.join(parts)}; kernels that ran: {used}")
