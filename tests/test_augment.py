"What the augmentation notebook can't show: any size and box, the distribution of boxes, orders of the jitter, autocast, a GPU"
import pytest, torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings, strategies as st
from torchvision.transforms import RandomResizedCrop
from mim_nb.augment import Augment, blend, color_jitter, crop_resize, random_boxes, resample_weights, resize
from mim_nb.data import load_data

few = settings(max_examples=40, deadline=None)

@few
@given(st.integers(4,60), st.integers(4,60), st.integers(1,50), st.sampled_from(['bilinear','bicubic']), st.sampled_from([1,3]), st.data())
def test_crop_is_torchvisions(h, w, s, mode, c, draw):
    g = torch.Generator().manual_seed(draw.draw(st.integers(0,99)))
    x,box = torch.rand(3,c,h,w, generator=g),[]
    for _ in range(3):
        bh,bw = draw.draw(st.integers(1,h)),draw.draw(st.integers(1,w))
        box.append((draw.draw(st.integers(0,h-bh)), draw.draw(st.integers(0,w-bw)), bh, bw))
    got = crop_resize(x, *torch.tensor(box).float().T, s, interpolation=mode)
    want = torch.stack([TF.resized_crop(o, *b, [s,s], TF.InterpolationMode(mode), antialias=True).clamp(0,1) for o,b in zip(x, box)])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)

def test_weights_of_the_whole_are_the_identity():
    w = resample_weights(torch.zeros(1), torch.full((1,), 9.), 9, 9)
    torch.testing.assert_close(w[0], torch.eye(9), atol=1e-6, rtol=0)

@pytest.mark.parametrize('h,w,scale,ratio', [(28,28,(.2,1.),(3/4,4/3)), (30,90,(.5,1.),(3/4,4/3)), (90,30,(.3,1.),(3/4,4/3)), (40,40,(.08,1.),(.5,2.)), (20,90,(.9,1.),(1.,1.)), (30,20,(.01,.02),(2.,3.))])
def test_boxes_are_torchvisions(h, w, scale, ratio):
    g,n = torch.Generator().manual_seed(1),6000; torch.manual_seed(1)
    ours = torch.stack(random_boxes(lambda k: torch.rand(n, k, generator=g), h, w, scale, ratio), 1)
    assert (ours>=0).all() and (ours[:,0]+ours[:,2]<=h).all() and (ours[:,1]+ours[:,3]<=w).all() and (ours==ours.round()).all()
    theirs = torch.tensor([RandomResizedCrop.get_params(torch.empty(1,h,w), list(scale), list(ratio)) for _ in range(n)]).float()
    for a,b in zip(ours.T, theirs.T):
        assert abs(a.mean()-b.mean())<5*(a.var()/n+b.var()/n).sqrt()+1e-6
        grid = torch.arange(max(h,w)+1.)[:,None]
        assert ((a<=grid).float().mean(1)-(b<=grid).float().mean(1)).abs().max()<.045       # Kolmogorov-Smirnov, p < 1e-5

def test_way_out():
    for h,w in [(10,100),(100,10)]:       # no candidate of this area can fit
        box = torch.stack(random_boxes(lambda k: torch.rand(5,k), h, w, (1.,1.), (3/4,4/3)), 1)
        assert {tuple(o) for o in box.int().tolist()}=={RandomResizedCrop.get_params(torch.empty(1,h,w), [1.,1.], [3/4,4/3])}

@few
@given(st.integers(0,2), st.floats(0,3), st.sampled_from([1,3]))
def test_blend_is_torchvisions(kind, f, c):
    x = torch.rand(2,c,7,9, generator=torch.Generator().manual_seed(1))
    got = blend(x, torch.tensor([kind,kind]), torch.tensor([f,f]))
    adjust = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation][kind]
    torch.testing.assert_close(got, torch.stack([adjust(o, f) for o in x]), atol=1e-5, rtol=0)

def test_jitter_order_and_range():
    "Each image's result is one of the six orders of its own three factors, all orders occur, factors fill their range"
    n,g = 300,torch.Generator().manual_seed(0); x = torch.rand(n,3,5,5, generator=g)
    drawn = []
    def rand(k): drawn.append(torch.rand(n, k, generator=g)); return drawn[-1]
    out = color_jitter(x, rand, (.4,.3,.2))
    factor = 1+torch.tensor([.4,.3,.2])*(2*drawn[0]-1)
    adjust,orders = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation],set()
    for i in range(n):
        order = drawn[1][i].argsort().tolist(); orders.add(tuple(order)); want = x[i]
        for k in order: want = adjust[k](want, float(factor[i,k]))
        torch.testing.assert_close(out[i], want, atol=1e-5, rtol=0)
    assert len(orders)==6
    assert (color_jitter(x, rand, (2.,0,0))>=0).all()       # a factor is never below 0

def test_augment():
    x = torch.randint(0, 256, (64,3,20,30), dtype=torch.uint8)
    a = Augment(16, jitter=(.4,.4,.4)); g = lambda: torch.Generator().manual_seed(5)
    out = a(x, g())
    assert out.shape==(64,3,16,16) and out.dtype==torch.float32 and out.min()>=0 and out.max()<=1 and not out.requires_grad
    assert torch.equal(out, a(x, g())) and not torch.equal(out, a(x))
    torch.testing.assert_close(a(x/255, g()), out)
    same = Augment(16)(x[:1].expand(64,-1,-1,-1))
    assert len({o.numpy().tobytes() for o in same})==64                    # each its own
    g1 = load_data(split='test').images[:50]
    assert Augment(28, jitter=(0,0,.9), scale=(1,1), ratio=(1,1), flip=0)(g1).sub(g1/255).abs().max()<1e-5

def test_flip_rate():
    x = torch.zeros(4000,1,1,2, dtype=torch.uint8); x[...,1] = 255
    out = Augment(2, scale=(1,1), ratio=(2,2), flip=.3)(x, torch.Generator().manual_seed(0))
    assert abs((out[:,0,0,0]>.5).float().mean()-.3)<.04

def test_resize():
    x = torch.randint(0, 256, (3,3,40,40), dtype=torch.uint8)
    for s in (10,40,64):
        y = resize(x, s); assert y.shape==(3,3,s,s) and y.dtype==torch.float32 and 0<=y.min() and y.max()<=1
    torch.testing.assert_close(resize(x, 10), TF.resize(x/255, [10,10], TF.InterpolationMode.BICUBIC, antialias=True).clamp(0,1))

def test_wrong_name():
    with pytest.raises(ValueError, match='bilinear or bicubic'): Augment(8, interpolation='nearest')

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_gpu():
    x = torch.randint(0, 256, (8,3,20,30), dtype=torch.uint8); a = Augment(16, jitter=.4)
    cpu,gpu = a(x, torch.Generator().manual_seed(5)),a(x.cuda(), torch.Generator().manual_seed(5))
    torch.testing.assert_close(gpu.cpu(), cpu, atol=1e-4, rtol=0)

@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'))])
def test_the_same_under_autocast(device):
    x = torch.randint(0, 256, (8,3,20,30), dtype=torch.uint8, device=device); a = Augment(16, jitter=.4)
    want,small = a(x, torch.Generator().manual_seed(5)),resize(x, 12)
    with torch.autocast(device, torch.bfloat16):
        got,small2 = a(x, torch.Generator().manual_seed(5)),resize(x, 12)
        assert (x.float()@x.float().mT).dtype==torch.bfloat16                  # autocast was on, and still is
    assert got.dtype==small2.dtype==torch.float32 and torch.equal(got, want) and torch.equal(small2, small)

def test_repr_tells_the_settings_and_nothing_else():
    "Runs note it among their settings: no addresses, the same for the same settings"
    assert repr(Augment(8, flip=.2))==repr(Augment(8, flip=.2)) and repr(Augment(8))!=repr(Augment(8, flip=.2)) and ' at 0x' not in repr(Augment(8))

def test_float64_and_half_are_taken():
    for t in (torch.float64, torch.float16): assert Augment(8)(torch.rand(2,1,9,9).to(t)).dtype==torch.float32
