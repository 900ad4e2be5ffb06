"""Lets torchvision be imported with a CPU build of PyTorch, of which the package index has no twin.

Its operators for images, which nothing here calls, have no code there; the import only looks for their names.
"""

import torch

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # its declarations live as long as it does
if torch.__version__.endswith("+cpu"):
    for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
        LIBRARY.define(f"{name}(Tensor x) -> Tensor")
        LIBRARY.define(f"_{name}_backward(Tensor x) -> Tensor")
    for name in ("nms", "qnms", "qroi_align"):
        LIBRARY.define(f"{name}(Tensor x) -> Tensor")
