"""The architectures of `coverage.py`: the smallest member of every family, and those that deployments ask for by name."""

from __future__ import annotations

_TIMM = """
resnet18 resnet26d resnext50_32x4d seresnext26d_32x4d resnetv2_18 res2net50_26w_4s resnest14d skresnet18 ecaresnet26t
resnetrs50 legacy_seresnet18 convnext_atto convnextv2_atto mobilenetv1_100 mobilenetv2_100 mobilenetv3_small_100
mobilenetv4_conv_small mobilenetv4_hybrid_medium efficientnet_lite0 efficientnet_b0 tf_efficientnetv2_b0 mixnet_s
fbnetc_100 mnasnet_100 spnasnet_100 ghostnet_100 ghostnetv2_100 ghostnetv3_100 hardcorenas_a lcnet_050 lcnetv2_small
tinynet_e regnetx_002 regnety_002 regnetz_b16 densenet121 inception_v3 inception_v4 inception_next_atto xception41
legacy_xception vgg11_bn dla34 dpn48b hrnet_w18_small selecsls42b rexnet_100 repvgg_a0 repghostnet_050 repvit_m0_9
mobileone_s0 hgnetv2_b0 hgnet_tiny cspresnet50 cspdarknet53 cspnext_tiny darknet53 ese_vovnet19b_dw eca_nfnet_l0
nf_regnet_b1 gernet_s botnet26t_256 lambda_resnet26t halonet26t bat_resnext26ts tresnet_m fasternet_t0 starnet_s1
mambaout_femto rdnet_tiny cpubone_b0_bfrobust csatv2
vit_tiny_patch16_224 vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2 vit_small_patch16_dinov3
vit_base_patch16_siglip_224 vit_base_patch32_clip_224 vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224
vit_medium_patch16_gap_240 vit_base_resnet26d_224 flexivit_small deit_tiny_patch16_224 deit_tiny_distilled_patch16_224
deit3_small_patch16_224 beit_base_patch16_224 cait_xxs24_224 xcit_nano_12_p16_224 convit_tiny swin_tiny_patch4_window7_224
swin_s3_tiny_224 swinv2_tiny_window8_256 swinv2_cr_tiny_ns_224 pvt_v2_b0 twins_svt_small twins_pcpvt_small coat_lite_tiny
coatnet_nano_rw_224 maxvit_nano_rw_256 maxvit_tiny_tf_224 crossvit_tiny_240 levit_128s levit_conv_128s mobilevit_xxs
mobilevitv2_050 edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvit_b0 efficientvit_m0 efficientvim_m1
fastvit_t8 fastvit_mci0 fastvit_mci3 shvit_s1 shvit_s2 shvit_s3 shvit_s4 vitamin_small_224 mixer_s32_224 resmlp_12_224
gmlp_ti16_224 gmixer_12_224 convmixer_768_32 poolformer_s12 poolformerv2_s12 caformer_s18 convformer_s18
tnt_s_legacy_patch16_224 volo_d1_224 visformer_tiny nest_tiny sequencer2d_s tiny_vit_5m_224 eva02_tiny_patch14_224
davit_tiny gcvit_xxtiny hiera_tiny_224 sam2_hiera_tiny focalnet_tiny_srf nextvit_small swiftformer_xs iformer_m
lowformer_b0 mvitv2_tiny pit_ti_224 naflexvit_base_patch16_gap
"""

_TORCHVISION = """
alexnet squeezenet1_1 vgg11 googlenet inception_v3 densenet121 mnasnet0_5 mobilenet_v2 mobilenet_v3_small resnet18
shufflenet_v2_x0_5 regnet_y_400mf efficientnet_b0 convnext_tiny vit_b_16 swin_t swin_v2_t maxvit_t
lraspp_mobilenet_v3_large deeplabv3_mobilenet_v3_large fcn_resnet50
"""

_HF = """
WinKawaks/vit-tiny-patch16-224 facebook/dinov2-small openai/clip-vit-base-patch32 google/siglip-base-patch16-224
microsoft/cvt-13 nvidia/mit-b0 nvidia/segformer-b0-finetuned-ade-512-512 microsoft/resnet-50 facebook/convnext-tiny-224
microsoft/swin-tiny-patch4-window7-224
"""

WITHOUT_HEAD = ("siglip", "_clip_", "dinov2", "dinov3")
"""timm's towers: built without a classifier, as they are used."""

ARCHITECTURES = (
    *(f"timm:{name}" for name in _TIMM.split()),
    *(f"torchvision:{name}" for name in _TORCHVISION.split()),
    *(f"hf:{name}" for name in _HF.split()),
)
REDUCED = ("timm:test_vit", "timm:test_resnet", "timm:test_efficientnet")
"""timm's networks for tests: what runs in CI."""


def arguments(model: str) -> dict[str, object]:
    """Return the constructor's arguments of an architecture."""
    headless = model.startswith("timm:") and any(part in model for part in WITHOUT_HEAD)
    return {"num_classes": 0} if headless else {}
