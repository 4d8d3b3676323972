"""resnet8 of the CIFAR kind in PyTorch, in the names its users have for the layers."""


def resnet8(torch, classes):
    """A module with projection shortcuts; `torch` is the package, as it is optional."""
    nn = torch.nn

    def conv_norm(old, new, kernel, stride):
        convolution = nn.Conv2d(old, new, kernel, stride, kernel // 2, bias=False)
        return convolution, nn.BatchNorm2d(new)

    class Block(nn.Module):
        def __init__(self, old, new, stride):
            super().__init__()
            self.conv1, self.bn1 = conv_norm(old, new, 3, stride)
            self.conv2, self.bn2 = conv_norm(new, new, 3, 1)
            if old != new:
                self.downsample = nn.Sequential(*conv_norm(old, new, 1, stride))

        def forward(self, x):
            h = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return torch.relu(h + (self.downsample(x) if len(self._modules) > 4 else x))

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = conv_norm(3, 16, 3, 1)
            self.layer1 = nn.Sequential(Block(16, 16, 1))
            self.layer2 = nn.Sequential(Block(16, 32, 2))
            self.layer3 = nn.Sequential(Block(32, 64, 2))
            self.fc = nn.Linear(64, classes)

        def forward(self, x):
            h = torch.relu(self.bn1(self.conv1(x)))
            h = self.layer3(self.layer2(self.layer1(h)))
            return self.fc(h.mean((2, 3)))

    return ResNet()
