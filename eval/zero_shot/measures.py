"""What the figures of zero-shot evaluation are called, each with the key of its chance level."""

MEASURES = {
    "i2t_r1": ("image->text R@1", "chance_r1"),
    "i2t_r5": ("image->text R@5", None),
    "i2t_r10": ("image->text R@10", None),
    "t2i_r1": ("text->image R@1", "chance_r1"),
    "t2i_r5": ("text->image R@5", None),
    "t2i_r10": ("text->image R@10", None),
    "top1": ("top-1 accuracy", "chance_top1"),
    "top5": ("top-5 accuracy", "chance_top5"),
    "class_mean": ("mean class accuracy", "chance_top1"),
    "miou": ("mean IoU", "chance_miou"),
    "pixel_accuracy": ("pixel accuracy", None),
}
