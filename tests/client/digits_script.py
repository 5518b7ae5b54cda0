"""A script for the `schedulefree` package, as its MNIST example is one: its user changes nothing but the import."""

import argparse

import schedulefree
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from freestep.demo.data import load


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 5, stride=2)
        self.dropout = nn.Dropout(0.1)
        self.hidden = nn.Linear(8 * 12 * 12, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        found = F.relu(self.conv(images)).flatten(1)
        return self.out(F.relu(self.hidden(self.dropout(found))))


def train(model: Net, optimizer: torch.optim.Optimizer, loader: DataLoader) -> None:
    model.train()
    optimizer.train()
    for images, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


@torch.no_grad()
def test(model: Net, optimizer: torch.optim.Optimizer, loader: DataLoader) -> tuple[float, int]:
    model.eval()
    optimizer.eval()
    loss, right = 0.0, 0
    for images, labels in loader:
        logits = model(images)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(1) == labels).sum())
    return loss, right


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.0025)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    digits = load()
    loader = DataLoader(TensorDataset(digits.train_images, digits.train_labels), args.batch_size, shuffle=True)
    test_loader = DataLoader(TensorDataset(digits.test_images, digits.test_labels), 1000)
    model = Net()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=args.lr, warmup_steps=20)
    for epoch in range(args.epochs):
        train(model, optimizer, loader)
        loss, right = test(model, optimizer, test_loader)
        print(f"epoch {epoch}: {loss / len(digits.test_labels)} {right}")  # noqa: T201


if __name__ == "__main__":
    main()
