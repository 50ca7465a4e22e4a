"""ViT encoders: any timm ViT as a module that returns feature maps."""
