"One graph: `torch.compile` traces each method's whole forward when images, mask and target are given"
import pytest, torch
from mim_nb.methods import create, methods
from mim_nb.tokenizers import DVAE

def ready(name):
    "A small method, images, a mask as it samples one, and a target"
    torch.manual_seed(0)
    m = create(name)
    if hasattr(m, 'set_tokenizer'): m.set_tokenizer(DVAE(vocab_size=m.head.out_features))
    images = torch.rand(4, 1, 28, 28)
    with torch.no_grad(): return m, images, m.sample_mask(4), m.target(images)

@pytest.mark.parametrize('name', methods)
def test_the_whole_forward_is_one_graph(name):
    m,images,mask,target = ready(name)
    want = m(images, mask, target)
    want.loss.backward()
    grads = {n: p.grad.clone() for n,p in m.named_parameters() if p.grad is not None}
    m.zero_grad()
    torch._dynamo.reset()
    got = torch.compile(m, fullgraph=True, backend='eager')(images, mask, target)
    got.loss.backward()
    assert torch.equal(got.loss, want.loss) and torch.equal(got.pred, want.pred)
    assert torch.equal(got.mask, mask.tensor) and got.logs.keys()==want.logs.keys()
    assert all(torch.equal(p.grad, grads[n]) for n,p in m.named_parameters() if n in grads)

def test_blocks_that_hide_differently_many_patches_need_no_second_break():
    "BEiT hides another number of patches in each step; the graph takes it as an unknown size"
    m,images,mask,target = ready('beit')
    torch._dynamo.reset()
    f = torch.compile(m, fullgraph=True, backend='eager')
    sizes = set()
    for seed in range(8):
        mask = m.sample_mask(4, torch.Generator().manual_seed(seed))
        sizes.add(len(mask.hidden_at))
        assert torch.equal(f(images, mask, target).loss, m(images, mask, target).loss)
    assert len(sizes)>1
