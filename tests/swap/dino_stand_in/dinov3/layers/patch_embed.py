from dinov2.layers import patch_embed


class PatchEmbed(patch_embed.PatchEmbed):
    pass
