"""What is used of timm, without wandb, which timm would import where it is installed. Import it from here.

Of what timm does with it (write a line of its own trainings) nothing is used, and importing it takes half a second;
`train.loggers` imports it where a run asks for it.
"""

from m3vit.hidden import hidden

with hidden("wandb"):
    import timm
    from timm.layers import LayerScale, Mlp, PatchEmbed, resample_abs_pos_embed, resample_patch_embed
    from timm.models import eva, group_parameters, load_state_dict, vision_transformer
    from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
    from timm.models.vision_transformer import Attention, Block, ResPostBlock, VisionTransformer
