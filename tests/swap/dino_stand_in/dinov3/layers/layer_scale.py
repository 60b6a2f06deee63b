from dinov2.layers import layer_scale


class LayerScale(layer_scale.LayerScale):
    pass
